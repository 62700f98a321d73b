"""Memory: measured exactly, and kept low by offloading."""
