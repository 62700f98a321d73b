"""Federated averaging (FedAvg) of networks that every client trains with local losses, on Flower."""
