"""The answer, sooner: a policy's decisions taken while the network runs, in several run times."""
