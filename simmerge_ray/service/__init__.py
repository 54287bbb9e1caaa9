"""Answers to "which merge should I make?": the recommender and the shapes of its requests. No Serve, no Ray."""
