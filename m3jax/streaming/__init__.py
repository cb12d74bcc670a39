"""The door of the merger: model directories in, a model directory out, in memory that does not grow with the model."""
