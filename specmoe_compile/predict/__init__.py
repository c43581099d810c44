"""Ways to predict which experts a MoE layer will choose, by name, behind one interface."""
