"""Repair pictures: light, blur, things to remove."""
