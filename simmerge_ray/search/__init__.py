"""The ground-truth search without Ray: what is to be measured, one trial, what is proposed next, and what came out."""
