"""Many runs of one experiment: `confide sweep`."""
