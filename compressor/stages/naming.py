"""Names inside exported graphs that device and host agree on."""

OPSET = 20
PROBABILITY = "probability"
VIEW_OUTPUT = "ew_view_channels"
