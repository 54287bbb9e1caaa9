"""The demo zoo: four small domains, one tiny base and the fine-tunes that the demo merges."""
