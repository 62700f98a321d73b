"""Training on several ranks: rendezvous and agreement, messages, replicas, shards and stages."""
