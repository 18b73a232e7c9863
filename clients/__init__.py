"""The site: its data, policy, local training, and the agent's answers. Never trusts the coordinator."""
