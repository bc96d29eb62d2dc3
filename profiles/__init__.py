"""What is known about devices and past runs; shipped as `autoprec.profiles`."""
