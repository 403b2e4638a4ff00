"""What all front ends share: addresses, authentication, limits and status details."""
