"""Configs of other trainers as configs of Menma, with a word on every key.

One module a trainer holds the table of its keys; `tables` reads such a table, `draft` is the config
that comes out. No torch, and nothing that is read is executed.
"""
