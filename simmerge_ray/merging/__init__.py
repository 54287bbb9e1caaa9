"""The merge engine: plans and mergekit files, tensor by tensor, into a checkpoint directory or a live engine."""
