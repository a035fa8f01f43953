"""Layers of this package in models that exist: conversion, cluster ids, state dicts, calibration."""
