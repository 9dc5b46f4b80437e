"""Tables and curves from plain values; knows no other room."""
