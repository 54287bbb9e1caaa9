"""The only package that imports Ray: it decides where things run, and adds no result of its own."""
