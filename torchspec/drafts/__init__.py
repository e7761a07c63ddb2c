"""What can be trained: one folder a kind of draft, behind one seam."""
