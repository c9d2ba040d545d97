"""What the Triton kernels of several operators share. Only launchers import it: it loads Triton."""
