"""How the layers compute: the equations, and closed forms, in plain torch and within a graph of torch.compile."""
