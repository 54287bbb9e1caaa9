"""Learning from rewards: a Bayesian linear model for each arm on the selector's encoder, and Thompson sampling."""
