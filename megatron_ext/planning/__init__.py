"""What a recipe costs on a grid: rehearsed on the real model code, without memory or ranks."""
