"""The pieces that several methods are made of."""
