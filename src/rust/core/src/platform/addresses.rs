//! The addresses of this machine.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// The addresses at which other machines can reach this one, best first: the one of the default route, those of IPv4,
/// those of IPv6. Without a network, the loopback address alone.
pub fn own_addresses() -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = default_route().into_iter().collect();
    let mut others = interface_addresses().unwrap_or_default();
    others.sort_by_key(IpAddr::is_ipv6);
    for address in others {
        if is_reachable(address) && !all.contains(&address) {
            all.push(address);
        }
    }
    if all.is_empty() {
        all.push(Ipv4Addr::LOCALHOST.into());
    }
    all
}

/// A link-local address of IPv6 means nothing without the interface of the other machine.
fn is_reachable(address: IpAddr) -> bool {
    !address.is_loopback()
        && !address.is_unspecified()
        && match address {
            IpAddr::V4(address) => !address.is_link_local(),
            IpAddr::V6(address) => !address.is_unicast_link_local(),
        }
}

/// The address from which packets to other networks are sent. Nothing is sent: a UDP socket that is connected only
/// looks for its route. The destination is an address of the documentation's network.
fn default_route() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    let address = socket.local_addr().ok()?.ip();
    is_reachable(address).then_some(address)
}

fn interface_addresses() -> io::Result<Vec<IpAddr>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs sets the pointer to a list that freeifaddrs frees. An address is read as its family says, and
    // copied before the list is freed.
    unsafe {
        if libc::getifaddrs(&raw mut list) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut addresses = Vec::new();
        let mut next = list;
        while let Some(entry) = next.as_ref() {
            if let Some(address) = entry.ifa_addr.as_ref() {
                match i32::from(address.sa_family) {
                    libc::AF_INET => {
                        let address = entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned();
                        let bytes = address.sin_addr.s_addr.to_ne_bytes();
                        addresses.push(Ipv4Addr::from(bytes).into());
                    }
                    libc::AF_INET6 => {
                        let address = entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned();
                        addresses.push(Ipv6Addr::from(address.sin6_addr.s6_addr).into());
                    }
                    _ => {}
                }
            }
            next = entry.ifa_next;
        }
        libc::freeifaddrs(list);
        Ok(addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn this_machine_can_listen_at_all_its_addresses() {
        let all = own_addresses();
        assert!(!all.is_empty());
        for address in &all {
            TcpListener::bind((*address, 0)).unwrap();
        }
        assert!(all.len() == 1 || !all.iter().any(IpAddr::is_loopback));
        let mut once = all.clone();
        once.dedup();
        assert_eq!(once.len(), all.len());
    }

    #[test]
    fn the_interfaces_have_the_loopback_address() {
        let all = interface_addresses().unwrap();
        assert!(all.contains(&Ipv4Addr::LOCALHOST.into()), "{all:?}");
    }
}
