"""Update transforms: what a client's update undergoes on its way to the server, a file each."""
