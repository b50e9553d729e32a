"""Parts of a policy: what acts besides its network and is saved with it. One kind, one file."""
