"""One module for each version of the schema. A migration is never changed once it is released."""
