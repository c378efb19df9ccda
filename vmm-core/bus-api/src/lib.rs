//! Wire format of the bus links between core and the bus daemons, and the platform map
