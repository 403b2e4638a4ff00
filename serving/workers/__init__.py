"""Several server processes behind one port: a supervisor starts them, and stands for all of them."""
