"""Where the sites of a simulated run live, and who carries its messages: `--engine`, `--workers`."""
