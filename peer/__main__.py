"""`python -m dugnad.peer` is the `dugnad` command."""

from dugnad.peer.cli import main

if __name__ == "__main__":
    main()
