"""How each training method makes its gradients."""
