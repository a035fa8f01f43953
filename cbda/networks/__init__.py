"""Wide residual networks, and networks with the layer under test in them."""
