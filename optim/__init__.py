"""The numbers: pseudo-gradients, int8 codes, the all-reduce, the outer step."""
