"""`menma demo`: the whole pipeline on a tiny model, offline."""
