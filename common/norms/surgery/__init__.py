"""Layers of this package in models of others: conversion, activations, cluster ids, state dicts, calibration."""
