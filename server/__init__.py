"""The coordinator: plans a run, drives its rounds, holds no key and no data."""
