"""The network: identities, signed records, gossip, peers found and reached, bytes moved."""
