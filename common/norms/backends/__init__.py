"""How the layers compute: the equations, and closed forms in plain torch and through torch.compile."""
