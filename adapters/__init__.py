"""What the library is: frozen backbones, stored features, heads, objectives and posteriors."""
