"""The pure cores: consent, differential privacy, sealed sums, audit. They know nothing of Flower."""
