"""Data: corpora to token shards (pack), and token shards to batches in an order that is a pure function of a seed."""
