"""All that crosses the wire: manifest, envelopes, messages, and their form in Flower's records."""
