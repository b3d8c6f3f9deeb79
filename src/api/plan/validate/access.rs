//! How a side is reached: endpoints, TLS, users and their secrets.

use std::collections::BTreeMap;

use super::Validation;
use crate::api::plan::SpecFault;
use crate::api::spec::{Auth, SecretKeyRef, SecretRef, Sentinel, Tls, Topology};
use crate::connection::{
    Address, Credentials, RedisAccess, Secret, SentinelAccess, TlsAccess, TopologyChoice,
};

/// What source and target say in the same words.
pub(super) struct Access<'a> {
    pub path: &'static str,
    pub topology: Topology,
    pub endpoints: &'a [String],
    pub sentinel: Option<&'a Sentinel>,
    pub auth: &'a Auth,
    pub tls: &'a Tls,
    pub endpoint_map: &'a BTreeMap<String, String>,
}

impl Validation<'_> {
    pub(super) fn access(&mut self, access: Access<'_>) -> RedisAccess {
        let Access { path, topology, endpoints, sentinel, auth, tls, endpoint_map } = access;
        if endpoints.is_empty() {
            self.fault(format!("{path}.endpoints"), "has no entry; allowed: one host:port or more");
        }
        let endpoints = endpoints
            .iter()
            .enumerate()
            .filter_map(|(index, text)| self.address(format!("{path}.endpoints[{index}]"), text))
            .collect();
        let map_path = format!("{path}.endpointMap");
        let endpoint_map = endpoint_map
            .iter()
            .filter_map(|(announced, reachable)| {
                let announced_address = self.address(map_path.clone(), announced);
                let reachable = self.address(format!("{map_path}.{announced}"), reachable);
                Some((announced_address?, reachable?))
            })
            .collect();
        if topology == Topology::Sentinel && sentinel.is_none() {
            self.fault(format!("{path}.sentinel"), "is missing; needed by topology Sentinel");
        }
        if sentinel.is_some() && !matches!(topology, Topology::Sentinel | Topology::Auto) {
            self.fault(format!("{path}.sentinel"), format!("not allowed with topology {topology:?}"));
        }
        RedisAccess {
            topology: match topology {
                Topology::Auto => TopologyChoice::Auto,
                Topology::Standalone => TopologyChoice::Standalone,
                Topology::Sentinel => TopologyChoice::Sentinel,
                Topology::Cluster => TopologyChoice::Cluster,
            },
            endpoints,
            sentinel: sentinel.map(|sentinel| self.sentinel(&format!("{path}.sentinel"), sentinel)),
            credentials: self.credentials(&format!("{path}.auth"), auth),
            tls: self.tls(&format!("{path}.tls"), tls),
            endpoint_map,
        }
    }

    fn address(&mut self, path: String, text: &str) -> Option<Address> {
        // Not shown: a URL may hold a password.
        if text.contains(['/', '@']) {
            self.fault(path, "is a URL; allowed: host:port, user and password belong under auth");
            return None;
        }
        match text.parse() {
            Ok(address) => Some(address),
            Err(error) => {
                self.fault(path, error.to_string());
                None
            }
        }
    }

    fn sentinel(&mut self, path: &str, sentinel: &Sentinel) -> SentinelAccess {
        let Sentinel { master, auth } = sentinel;
        if master.is_empty() {
            self.fault(format!("{path}.master"), "is empty");
        }
        SentinelAccess {
            master: master.clone(),
            credentials: self.credentials(&format!("{path}.auth"), auth),
        }
    }

    fn credentials(&mut self, path: &str, auth: &Auth) -> Option<Credentials> {
        let Auth { username, password_secret_ref } = auth;
        let Some(reference) = password_secret_ref else {
            if !username.is_empty() {
                self.fault(format!("{path}.passwordSecretRef"), "is missing; needed by username");
            }
            return None;
        };
        let password = self.secret(&format!("{path}.passwordSecretRef"), reference)?;
        Some(Credentials { username: (!username.is_empty()).then(|| username.clone()), password })
    }

    fn tls(&mut self, path: &str, tls: &Tls) -> Option<TlsAccess> {
        let Tls { enabled, ca_secret_ref, client_cert_secret_ref, server_name, insecure_skip_verify } = tls;
        if !enabled {
            // A half-written block most likely lacks `enabled`; plain text would be a nasty surprise.
            if *tls != Tls::default() {
                self.fault(format!("{path}.enabled"), "is false, but other fields of tls are set");
            }
            return None;
        }
        let ca = ca_secret_ref.as_ref().and_then(|ca| self.secret(&format!("{path}.caSecretRef"), ca));
        let (mut client_certificate, mut client_key) = (None, None);
        if let Some(SecretRef { name }) = client_cert_secret_ref {
            let path = format!("{path}.clientCertSecretRef");
            let mut part =
                |key: &str| self.secret(&path, &SecretKeyRef { name: name.clone(), key: key.to_owned() });
            (client_certificate, client_key) = (part("tls.crt"), part("tls.key"));
        }
        Some(TlsAccess {
            ca,
            client_certificate,
            client_key,
            server_name: (!server_name.is_empty()).then(|| server_name.clone()),
            insecure_skip_verify: *insecure_skip_verify,
        })
    }

    fn secret(&mut self, path: &str, reference: &SecretKeyRef) -> Option<Secret> {
        let SecretKeyRef { name, key } = reference;
        let found = self.secrets.find(path, name, key);
        if found.is_none() {
            let allowed = self.secrets.allowed(name, key);
            let message = format!("secret \"{name}\" with key \"{key}\" not found; allowed: {allowed}");
            self.faults.push(SpecFault { path: path.to_owned(), message, secret_missing: true });
        }
        found
    }
}
