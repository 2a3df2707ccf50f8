"""The learners: how each training method computes its gradients."""
