"""The page at `/`: what the service knows and does, to look at and to try. It talks to the JSON API like any client."""
