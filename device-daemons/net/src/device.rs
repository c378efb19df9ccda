//! virtio-net (virtio 1.2, 5.1): features, configuration space, control commands, the head of a packet.

/// Length of `struct virtio_net_hdr` with `num_buffers`, as of virtio 1.
pub const HEAD: usize = 12;
/// Where `num_buffers` is in it.
const NUM_BUFFERS: usize = 10;
/// The longest packet with its head: an IP packet of the longest kind, an Ethernet head with VLAN tags.
pub const MAX_PACKET: usize = HEAD + 65_535 + 22;
/// The most queue pairs: two queues each and one for control are at most 64.
pub const MAX_PAIRS: u16 = 31;

/// Checksums are left to the device.
pub const F_CSUM: u64 = 1 << 0;
/// The driver takes packets without checksums.
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// The MAC address is given.
pub const F_MAC: u64 = 1 << 5;
/// The driver takes large TCP segments over IPv4.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// Over IPv6.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// The device takes large TCP segments over IPv4.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// Over IPv6.
pub const F_HOST_TSO6: u64 = 1 << 12;
/// A packet may lie in several buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// The link's state is given.
pub const F_STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const F_CTRL_VQ: u64 = 1 << 17;
/// There are several queue pairs.
pub const F_MQ: u64 = 1 << 22;

/// `VIRTIO_NET_CTRL_MQ` and `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const CTRL_MQ_VQ_PAIRS_SET: [u8; 2] = [4, 0];
/// Length of that command.
pub const COMMAND: usize = 4;
/// The answers.
pub const ACK: u8 = 0;
/// Refused.
pub const NAK: u8 = 1;

/// Length of the configuration space.
const CONFIG_LEN: usize = 10;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Packets for the driver, of this pair.
    Receive(u16),
    /// Packets of the driver, of this pair.
    Transmit(u16),
    /// Commands.
    Control,
}

/// A network device as the guest sees it.
#[derive(Clone, Debug)]
pub struct Nic {
    pairs: u16,
    features: u64,
    config: [u8; CONFIG_LEN],
}

impl Nic {
    /// A device with so many queue pairs, at most [`MAX_PAIRS`].
    #[must_use]
    pub fn new(mac: [u8; 6], pairs: u16) -> Self {
        let mut config = [0; CONFIG_LEN];
        let fields = [&mac[..], &1u16.to_le_bytes(), &pairs.to_le_bytes()].concat();
        config.iter_mut().zip(fields).for_each(|(slot, byte)| *slot = byte);
        Self { pairs, features: 0, config }
    }

    /// Feature bits of the device type that it offers.
    #[must_use]
    pub const fn offers(&self) -> u64 {
        let offloads = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6;
        let one = offloads | F_MAC | F_MRG_RXBUF | F_STATUS;
        if self.pairs > 1 { one | F_CTRL_VQ | F_MQ } else { one }
    }

    /// Virtqueues: with several pairs, one for control is the last.
    #[must_use]
    pub const fn queues(&self) -> u16 {
        if self.pairs > 1 { self.pairs * 2 + 1 } else { 2 }
    }

    /// Configuration space: address, status (the link is up), queue pairs.
    #[must_use]
    pub const fn config(&self) -> &[u8] {
        &self.config
    }

    /// The driver has taken these features.
    pub const fn acknowledge(&mut self, features: u64) {
        self.features = features;
    }

    /// Whether the driver has taken it.
    #[must_use]
    pub const fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// What queue `index` is for (5.1.2): without `F_MQ`, control is behind the first pair.
    #[must_use]
    pub const fn role(&self, index: u16) -> Option<Role> {
        let pairs = if self.has(F_MQ) { self.pairs } else { 1 };
        if index < pairs * 2 {
            Some(if index.is_multiple_of(2) { Role::Receive(index / 2) } else { Role::Transmit(index / 2) })
        } else if index == pairs * 2 && self.has(F_CTRL_VQ) {
            Some(Role::Control)
        } else {
            None
        }
    }

    /// The number of pairs to use from now on, if the command says that and may.
    #[must_use]
    pub fn command(&self, command: &[u8]) -> Option<u16> {
        let (kind, pairs) = command.split_first_chunk::<2>()?;
        let pairs = u16::from_le_bytes(*pairs.first_chunk::<2>()?);
        let valid = *kind == CTRL_MQ_VQ_PAIRS_SET && self.has(F_MQ) && (1..=self.pairs).contains(&pairs);
        valid.then_some(pairs)
    }
}

/// Writes how many buffers a packet takes into its head; 1 where buffers are not merged.
pub fn set_num_buffers(packet: &mut [u8], count: u16) {
    if let Some(field) = packet.get_mut(NUM_BUFFERS..HEAD) {
        field.copy_from_slice(&count.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_is_the_last_queue_or_the_third() {
        let mut nic = Nic::new([2, 0, 0, 0, 0, 1], 4);
        assert_eq!(nic.queues(), 9);
        nic.acknowledge(F_MQ | F_CTRL_VQ);
        assert_eq!(nic.role(7), Some(Role::Transmit(3)));
        assert_eq!((nic.role(8), nic.role(9)), (Some(Role::Control), None));
        nic.acknowledge(F_CTRL_VQ);
        assert_eq!(
            (nic.role(0), nic.role(2), nic.role(3)),
            (Some(Role::Receive(0)), Some(Role::Control), None)
        );
        nic.acknowledge(0);
        assert_eq!(nic.role(2), None);
    }

    #[test]
    fn one_pair_needs_no_control() {
        let nic = Nic::new([2, 0, 0, 0, 0, 1], 1);
        assert_eq!((nic.queues(), nic.offers() & (F_MQ | F_CTRL_VQ)), (2, 0));
        assert_eq!(nic.config(), [2, 0, 0, 0, 0, 1, 1, 0, 1, 0]);
    }

    #[test]
    fn commands_are_checked() {
        let mut nic = Nic::new([2, 0, 0, 0, 0, 1], 4);
        assert_eq!(nic.command(&[4, 0, 2, 0]), None, "not negotiated");
        nic.acknowledge(F_MQ | F_CTRL_VQ);
        assert_eq!(nic.command(&[4, 0, 4, 0]), Some(4));
        for wrong in
            [&[4, 0, 0, 0][..], &[4, 0, 5, 0], &[4, 0, 1, 1], &[4, 1, 1, 0], &[0, 0, 1, 0], &[4, 0, 1], &[]]
        {
            assert_eq!(nic.command(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_number_of_buffers_is_in_the_head() {
        let mut packet = [0xff; 14];
        set_num_buffers(&mut packet, 0x0102);
        assert_eq!(packet[8..], [0xff, 0xff, 2, 1, 0xff, 0xff]);
        set_num_buffers(&mut packet[..11], 1);
    }
}
