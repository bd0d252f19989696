"""The steps of the pipeline. Each is a pure function of its inputs, so that its result can be kept by content."""
