"""Helpers that tests of several parts share: servers, waiting, builders."""
