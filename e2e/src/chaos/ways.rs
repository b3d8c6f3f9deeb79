//! The proxies between the tool and one side, one for each server.

use anyhow::Result;
use serde_json::{Map, Value};

use super::deployment::{Deployment, Side};
use crate::{Manifest, Proxy};

pub struct Ways {
    side: Side,
    /// With the address that the server announces.
    proxies: Vec<(String, Proxy)>,
}

impl Ways {
    pub fn open(side: Side, deployment: &Deployment) -> Result<Self> {
        let addresses = deployment.servers().iter().map(crate::Server::address);
        let proxies = addresses.map(|address| Ok((address.clone(), Proxy::start(&address)?)));
        Ok(Self { side, proxies: proxies.collect::<Result<_>>()? })
    }

    /// Has the manifest reach the deployment through the proxies only. Sentinels are asked directly.
    pub fn describe(&self, manifest: Manifest, deployment: &Deployment) -> Manifest {
        let side = self.side.name();
        let path = |field: &str| format!("/spec/{side}/redis/{field}");
        let proxies: Vec<String> = self.proxies.iter().map(|(_, proxy)| proxy.address()).collect();
        let map: Map<String, Value> = self
            .proxies
            .iter()
            .map(|(announced, proxy)| (announced.clone(), Value::from(proxy.address())))
            .collect();
        match deployment {
            Deployment::Standalone(_) => {
                manifest.set(&path("endpoints"), proxies).set(&path("topology"), "Standalone")
            }
            Deployment::Watched(watched) => watched.describe(manifest, side).set(&path("endpointMap"), map),
            Deployment::Cluster(_) => manifest
                .set(&path("endpoints"), proxies)
                .set(&path("topology"), "Cluster")
                .set(&path("endpointMap"), map),
        }
    }

    pub fn each(&self, act: impl Fn(&Proxy)) {
        self.proxies.iter().for_each(|(_, proxy)| act(proxy));
    }

    /// Passes everything on again; frozen connections stay frozen.
    pub fn heal(&self) {
        self.each(|proxy| {
            proxy.refuse(false);
            proxy.stall(false);
            proxy.limit(None);
            proxy.defuse();
        });
    }
}
