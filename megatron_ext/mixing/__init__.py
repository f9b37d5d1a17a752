"""Router loads per data set, and the blend weights that follow from them."""
