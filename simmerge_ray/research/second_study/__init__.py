"""The second study: experts that gain much and forget, on a pretrained model's real tasks and on small bases."""
